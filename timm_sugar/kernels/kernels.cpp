// CPU kernels of exact and lean saving: each is a single pass over memory, for every dtype.
//
// cpu.py compiles this file once per surrogate, where DERIVATIVE_FLOAT and DERIVATIVE_DOUBLE are the bodies of the
// derivative as a function of x and alpha; and once without them, for lean saving with any surrogate.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t PARALLEL = 32768;  // minimum number of elements for several threads
constexpr int64_t CHUNK = 1 << 18;   // elements whose pages are mapped with one call
constexpr int64_t STRIP = 64;        // elements that are computed before they are stored
constexpr int64_t LARGE = 1 << 25;   // minimum size in bytes at which a tensor is evicted from the caches before use

template <typename To, typename From> To as(From bits) {
  static_assert(sizeof(To) == sizeof(From));
  To value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Calls pass(start, count) for every chunk. Threads get equal parts, rounded to whole strips.
template <typename Pass> void in_parallel(int64_t count, int threads, Pass pass) {
  const int64_t parts = count < PARALLEL ? 1 : std::max(threads, 1);
  const int64_t strips = (count + STRIP - 1) / STRIP, size = (strips + parts - 1) / parts * STRIP;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
  for (int64_t part = 0; part < count; part += size) {
    const int64_t end = std::min(part + size, count);
    for (int64_t start = part; start < end; start += CHUNK) pass(start, std::min(CHUNK, end - start));
  }
}

// Calls pass(start, count) for every strip. Conversion between numbers and bytes is a separate loop over a buffer:
// with both in one loop, compilers vectorise the arithmetic at the width of bytes. A strip is short, so that the loops
// overlap: one computes while another waits for memory.
template <typename Pass> void by_strips(int64_t count, Pass pass) {
  int64_t i = 0;
  for (; i + STRIP <= count; i += STRIP) pass(i, STRIP);
  if (i < count) pass(i, count - i);
}

// Whether to write a result with non-temporal stores. An ordinary store first reads the cache line that it overwrites.
template <typename T> bool bypasses_caches(const T* out, int64_t count) {
#ifdef __AVX2__
  return count * static_cast<int64_t>(sizeof(T)) >= LARGE && reinterpret_cast<uintptr_t>(out) % sizeof(__m256i) == 0;
#else
  return false;
#endif
}

// Maps the pages of newly allocated memory with one call. Otherwise each page faults at its first use, which takes
// longer than the pass. No-op if the last page is already mapped or the kernel does not support it.
template <typename T> void map_pages(T* out, int64_t count) {
#ifdef __linux__
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const auto first = reinterpret_cast<uintptr_t>(out) / page * page;
  const auto last = reinterpret_cast<uintptr_t>(out + count - 1) / page * page;
  unsigned char present = 0;
  if (mincore(reinterpret_cast<void*>(last), page, &present) == 0 && !(present & 1))
    madvise(reinterpret_cast<void*>(first), last + page - first, 23);  // MADV_POPULATE_WRITE, since Linux 5.14
#endif
}

// A strip of a result: computed in place, or in a buffer that is copied with non-temporal stores.
template <typename T> struct Strip {
  T* const out;
  T* const to;  // where to compute it
  alignas(32) T buffer[STRIP];

  Strip(T* out, bool past) : out(out), to(past ? buffer : out) {}

  void store(int64_t count) const {
    if (to == out) return;
#ifdef __AVX2__
    constexpr int64_t vectors = sizeof(T) * STRIP / sizeof(__m256i);
    if (count == STRIP) {
      for (int64_t i = 0; i < vectors; i++)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + i, reinterpret_cast<const __m256i*>(buffer)[i]);
      return;
    }
#endif
    std::copy(buffer, buffer + count, out);
  }
};

// Makes non-temporal stores visible to other threads.
inline void fence() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

// The storage type and the computation type of a dtype; relu takes the value in both.

template <typename T> struct Plain {
  using stored = T;
  using computed = T;
  static T load(T x) { return x; }
  static T store(T x) { return x; }
  static T relu(T x, T) { return x < 0 ? 0 : x; }
};

struct Bits {
  using stored = uint16_t;
  using computed = float;
  static uint16_t relu(uint16_t x, float value) { return x & -static_cast<uint16_t>(!(value < 0)); }
};

// Conversions use bit operations, since compilers do not vectorise the processor's conversion instructions in a loop.

struct Float16 : Bits {
  static float load(uint16_t x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
    const uint32_t more = (112u << 23) & -static_cast<uint32_t>(magnitude >= 0x0f800000);  // for infinity and NaN
    const uint32_t normal = magnitude + (112u << 23) + more;
    const uint32_t tiny = as<uint32_t>(as<float>(magnitude + (113u << 23)) - as<float>(113u << 23));
    const uint32_t is_tiny = -static_cast<uint32_t>(magnitude < 0x00800000);
    return as<float>((tiny & is_tiny) | (normal & ~is_tiny) | static_cast<uint32_t>(x & 0x8000) << 16);
  }
  static uint16_t store(float x) {
    const uint32_t bits = as<uint32_t>(x), magnitude = bits & 0x7fffffff;
    // to the nearest, ties to even
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t tiny = as<uint32_t>(as<float>(magnitude) + 0.5f) - (126u << 23);
    const uint32_t is_tiny = -static_cast<uint32_t>(magnitude < (113u << 23));
    const uint32_t is_large = -static_cast<uint32_t>(magnitude >= 0x477ff000);  // rounds to infinity
    const uint32_t is_nan = -static_cast<uint32_t>(magnitude > 0x7f800000);
    const uint32_t finite = (tiny & is_tiny) | (normal & ~is_tiny);
    const uint32_t half = (finite & ~is_large) | (0x7c00 & is_large) | (0x0200 & is_nan);
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
  }
};

struct BFloat16 : Bits {
  static float load(uint16_t x) { return as<float>(static_cast<uint32_t>(x) << 16); }
  static uint16_t store(float x) {
    const uint32_t bits = as<uint32_t>(x), nan = -static_cast<uint32_t>((bits & 0x7fffffff) > 0x7f800000);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    return static_cast<uint16_t>((rounded >> 16 & ~nan) | (0x7fc0 & nan));
  }
};

#ifdef DERIVATIVE_FLOAT

// This part is compiled with -ffinite-math-only, since otherwise bounds do not compile to the processor's min and max.
// NaN is detected by its bits, and gives NaN.
//
// Functions for derivatives. Those of the C library do not vectorise. These do: all float functions and exp in double.
// The absolute error is at most 2e-7 where the value is at most 1.

inline bool isnan(float x) { return (as<uint32_t>(x) & 0x7fffffff) > 0x7f800000; }
inline bool isnan(double x) { return (as<uint64_t>(x) & 0x7fffffffffffffff) > 0x7ff0000000000000; }

using std::atan;
using std::cos;
using std::log;
using std::log1p;
using std::pow;
using std::sin;
using std::sqrt;

// 2^(n - 1) and 2^f, where n + f = x / log(2) and n is an integer: adding 1.5 * 2^23 rounds to n, and leaves n + 126,
// the exponent of 2^(n - 1), in the lowest bits. The smallest exponent gives 0.

inline float scale_of(float& x) {
  x = x < -87.33f ? -87.33f : x;
  x = x > 89 ? 89 : x;
  const float shifted = x * 1.44269504f + (12582912.f + 126);
  x = x * 1.44269504f - (shifted - (12582912.f + 126));
  return as<float>(as<uint32_t>(shifted) << 23);
}

// Twice the minimax polynomial of degree 5 (relative error 9.2e-8) among those that are exact at 0. Terms are evaluated
// in pairs, since a chain of dependent operations takes longer.
inline float twice_power(float f) {
  const float square = f * f;
  return (2 + 1.3862939f * f) + square * ((0.48044484f + 0.11101467f * f) + square * (0.019343025f + 0.00265295f * f));
}

inline float exp(float x) {
  const float scale = scale_of(x);
  return twice_power(x) * scale;
}

inline float expm1(float x) {
  const float scale = scale_of(x), square = x * x;
  const float less = 1.3862944f * x +
                     square * ((0.48044484f + 0.11101467f * x) + square * (0.019343025f + 0.00265295f * x));
  return less * scale + 2 * (scale - 0.5f);
}

inline float tanh(float x) {
  const float m = expm1(x < 0 ? 2 * x : -2 * x), t = -m / (m + 2);
  return x < 0 ? -t : t;
}

inline float erf(float x) {  // Abramowitz and Stegun 7.1.26, to 1.5e-7
  const float z = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * z);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float y = 1 - p * exp(-(z * z));  // exp shared with GELU's density
  return as<float>(as<uint32_t>(y) | (as<uint32_t>(x) & 0x80000000));
}

inline double exp(double x) {
  x = x < -708 ? -709 : x;
  x = x > 710 ? 710 : x;
  const double shifted = x * 1.4426950408889634 + 6755399441055744., n = shifted - 6755399441055744.;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  const double a = 1. / 479001600 + r * (1. / 6227020800);  // Taylor's polynomial
  const double b = 1. / 40320 + r * (1. / 362880 + r * (1. / 3628800 + r * (1. / 39916800 + r * a)));
  const double p = 1 + r * (1 + r * (1. / 2 + r * (1. / 6 + r * (1. / 24 + r * (1. / 120 + r * (1. / 720 + r * (1. / 5040 + r * b)))))));
  const int64_t exponent = as<int64_t>(shifted) - 0x4338000000000000 + 1022;
  return 2 * p * as<double>((exponent < 0 ? 0 : exponent) << 52);
}

inline double expm1(double x) { return std::expm1(x); }
inline double tanh(double x) { return std::tanh(x); }
inline double erf(double x) { return std::erf(x); }

inline float formula(float x, float alpha) {
  using T = float;
  DERIVATIVE_FLOAT
}

inline double formula(double x, double alpha) {
  using T = double;
  DERIVATIVE_DOUBLE
}

inline float derivative(float x, float alpha) {
  const uint32_t nan = -static_cast<uint32_t>(isnan(x));
  return as<float>(as<uint32_t>(formula(x, alpha)) | nan);
}

inline double derivative(double x, double alpha) {
  const uint64_t nan = -static_cast<uint64_t>(isnan(x));
  return as<double>(as<uint64_t>(formula(x, alpha)) | nan);
}

template <typename D, typename T = typename D::stored>
void multiply(const T* grad, const T* x, T* out, int64_t count, double alpha, int threads) {
  const typename D::computed a = alpha;
  const bool past = bypasses_caches(out, count);
  in_parallel(count, threads, [=](int64_t first, int64_t many) {
    if (past) map_pages(out + first, many);
    by_strips(many, [=](int64_t offset, int64_t n) {
      const int64_t start = first + offset;
      Strip<T> strip(out + start, past);
      T* const to = strip.to;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) to[i] = D::store(D::load(grad[start + i]) * derivative(D::load(x[start + i]), a));
      strip.store(n);
    });
    if (past) fence();
  });
}

}  // namespace

#define EXPORT(dtype, D)                                                                                           \
  extern "C" void multiply_##dtype(const D::stored* grad, const D::stored* x, D::stored* out, int64_t count,       \
                                   double alpha, int threads) {                                                    \
    multiply<D>(grad, x, out, count, alpha, threads);                                                              \
  }

EXPORT(float16, Float16)
EXPORT(bfloat16, BFloat16)
EXPORT(float32, Plain<float>)
EXPORT(float64, Plain<double>)

#else  // lean saving; lean.py defines the codes

// Same as _number in lean.py, without branches, so that it vectorises.
template <typename Op> struct Encoder {
  Op lowest, highest, outer, below, above, inner;
  int32_t offset, to_zero;

  explicit Encoder(const double* e)
      : lowest(e[0]), highest(e[1]), outer(e[2]), below(e[3]), above(e[4]), inner(e[5]), offset(e[6]),
        to_zero(e[7] - e[6]) {}

  int32_t operator()(Op x) const {
    Op within = x > lowest ? x : lowest;  // NaN too
    within = within < highest ? within : highest;
    Op near = x > below ? x : below;
    near = near < above ? near : above;
    const Op steps = within * outer + near * inner;
    const int32_t code = static_cast<int32_t>(steps) + offset - (x < 0) + (-static_cast<int32_t>(x == 0) & to_zero);
    return code & -static_cast<int32_t>(x == x);
  }
};

template <typename D, typename T = typename D::stored>
void encode(const T* x, T* y, int32_t* numbers, int64_t count, const Encoder<typename D::computed>& encoder) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const auto value = D::load(x[i]);
    numbers[i] = encoder(value);
    y[i] = D::relu(x[i], value);
  }
}

template <typename D, typename T = typename D::stored>
void multiply(const T* grad, const typename D::computed* factors, T* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = D::store(D::load(grad[i]) * factors[i]);
}

template <typename Op> void look_up(const Op* table, const uint8_t* codes, Op* found, int64_t count) {
  for (int64_t i = 0; i < count; i++) found[i] = table[codes[i]];
}

template <typename Op> void look_up_halves(const Op* table, const uint8_t* codes, Op* low, Op* high, int64_t count) {
  for (int64_t i = 0; i < count; i++) low[i] = table[codes[i] & 15], high[i] = table[codes[i] >> 4];
}

#ifdef __AVX2__
// Compilers use gather instructions for the generic loops, which take two to four times as long.

void look_up(const float* table, const uint8_t* codes, float* found, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const uint8_t* c = codes + i;
    _mm256_storeu_ps(found + i, _mm256_setr_ps(table[c[0]], table[c[1]], table[c[2]], table[c[3]], table[c[4]],
                                               table[c[5]], table[c[6]], table[c[7]]));
  }
  look_up<float>(table, codes + i, found + i, count - i);
}

__m256 look_up(__m256 first, __m256 second, __m256i codes) {
  const __m256 eight = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // as a sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes), _mm256_permutevar8x32_ps(second, codes), eight);
}

void look_up_halves(const float* table, const uint8_t* codes, float* low, float* high, int64_t count) {
  const __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(low + i, look_up(first, second, both));
    _mm256_storeu_ps(high + i, look_up(first, second, _mm256_srli_epi32(both, 4)));
  }
  look_up_halves<float>(table, codes + i, low + i, high + i, count - i);
}
#endif

// Kernels for the part of one thread. `levels` is Levels.encoder or Levels.table of lean.py.

template <typename D, typename T = typename D::stored>
void encode_uint8(const T* x, T* y, uint8_t* codes, int64_t count, const double* levels, bool past) {
  const Encoder<typename D::computed> encoder(levels);
  by_strips(count, [=](int64_t start, int64_t n) {
    int32_t numbers[STRIP];
    Strip<T> strip(y + start, past);
    encode<D>(x + start, strip.to, numbers, n, encoder);
    strip.store(n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) codes[start + i] = static_cast<uint8_t>(numbers[i]);
  });
}

template <typename D, typename T = typename D::stored>
void decode_uint8(const T* grad, T* out, uint8_t* codes, int64_t count, const double* levels, bool past) {
  typename D::computed table[256];
  std::copy(levels, levels + 256, table);
  by_strips(count, [=, &table](int64_t start, int64_t n) {
    typename D::computed found[STRIP];
    look_up(table, codes + start, found, n);
    Strip<T> strip(out + start, past);
    multiply<D>(grad + start, found, strip.to, n);
    strip.store(n);
  });
}

// Two elements per byte: one of the first half of the tensor, and the one `second` elements after it.

template <typename D, typename T = typename D::stored>
void encode_uint4(const T* x, T* y, uint8_t* codes, int64_t count, const double* levels, bool past, int64_t second) {
  const Encoder<typename D::computed> encoder(levels);
  by_strips(count, [=](int64_t start, int64_t n) {
    int32_t low[STRIP], high[STRIP];
    Strip<T> strip(y + start, past), other(y + start + second, past);
    encode<D>(x + start, strip.to, low, n, encoder);
    encode<D>(x + start + second, other.to, high, n, encoder);
    strip.store(n);
    other.store(n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) codes[start + i] = static_cast<uint8_t>(low[i] + 16 * high[i]);
  });
}

template <typename D, typename T = typename D::stored>
void decode_uint4(const T* grad, T* out, uint8_t* codes, int64_t count, const double* levels, bool past,
                  int64_t second) {
  typename D::computed table[16];
  std::copy(levels, levels + 16, table);
  by_strips(count, [=, &table](int64_t start, int64_t n) {
    typename D::computed low[STRIP], high[STRIP];
    look_up_halves(table, codes + start, low, high, n);
    Strip<T> strip(out + start, past), other(out + start + second, past);
    multiply<D>(grad + start, low, strip.to, n);
    multiply<D>(grad + start + second, high, other.to, n);
    strip.store(n);
    other.store(n);
  });
}

template <typename T, typename Loop, typename... Last>
void run(Loop loop, const T* in, T* out, uint8_t* codes, int64_t count, const double* levels, int threads, bool past,
         Last... second) {
  in_parallel(count, threads, [=](int64_t start, int64_t n) {
    if (past) {
      map_pages(out + start, n);
      (map_pages(out + start + second, n), ...);
      map_pages(codes + start, n);
    }
    loop(in + start, out + start, codes + start, n, levels, past, second...);
    if (past) fence();
  });
}

}  // namespace

// One function per save mode and dtype, which lean.py calls by name.
#define EXPORT(name, dtype, D)                                                                                     \
  extern "C" void name##_uint8_##dtype(const D::stored* in, D::stored* out, uint8_t* codes, int64_t count,         \
                                       const double* levels, int threads) {                                        \
    const bool past = bypasses_caches(out, count);                                                                 \
    run(name##_uint8<D>, in, out, codes, count, levels, threads, past);                                            \
  }                                                                                                                \
  extern "C" void name##_uint4_##dtype(const D::stored* in, D::stored* out, uint8_t* codes, int64_t count,         \
                                       const double* levels, int threads) {                                        \
    const bool past = bypasses_caches(out, count) && bypasses_caches(out + count / 2, count);                      \
    run(name##_uint4<D>, in, out, codes, (count + 1) / 2, levels, threads, past, count / 2);                       \
  }

EXPORT(encode, float16, Float16)
EXPORT(decode, float16, Float16)
EXPORT(encode, bfloat16, BFloat16)
EXPORT(decode, bfloat16, BFloat16)
EXPORT(encode, float32, Plain<float>)
EXPORT(decode, float32, Plain<float>)
EXPORT(encode, float64, Plain<double>)
EXPORT(decode, float64, Plain<double>)

#endif
