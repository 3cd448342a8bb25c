// Lean saving on the CPU, for lean.py, which says what codes are: one pass over memory each way, for every surrogate.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include <c10/util/Half.h>

// Inductor's flags leave it out.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")
#endif

namespace {

constexpr int64_t BLOCK = 4096;      // elements that a thread takes at once
constexpr int64_t PARALLEL = 32768;  // elements from which on threads are worth their start

// How a dtype is stored and computed in; relu takes a value both ways.

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

struct Float16 : Bits {
  static float load(uint16_t x) { return c10::Half(x, c10::Half::from_bits()); }
  static uint16_t store(float x) { return c10::Half(x).x; }
};

struct BFloat16 : Bits {
  static float load(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint16_t store(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nan = -static_cast<uint32_t>(x != x);
    bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    return static_cast<uint16_t>((bits >> 16 & ~nan) | (0x7fc0 & nan));
  }
};

// As _number in lean.py, without branches, so that it vectorises.
template <typename Op> struct Encoder {
  Op lowest, highest, fine, below, less_below, above, less_above;
  int32_t offset, to_zero;

  explicit Encoder(const double* e)
      : lowest(e[0]), highest(e[1]), fine(e[2]), below(e[5]), less_below(e[6]), above(e[7]), less_above(e[8]),
        offset(e[3]), to_zero(e[4] - e[3]) {}

  int32_t operator()(Op x) const {
    Op within = x > lowest ? x : lowest;  // NaN too
    within = within < highest ? within : highest;
    const Op under = below - within, over = within - above;
    const Op bent = less_below * (under > 0 ? under : 0) - less_above * (over > 0 ? over : 0);
    const Op steps = within * fine + bent;
    const int32_t code = static_cast<int32_t>(steps) + offset - (x < 0) + (-static_cast<int32_t>(x == 0) & to_zero);
    return code & -static_cast<int32_t>(x == x);
  }
};

// Each loop below is a function of its own, whose arguments no store into a byte can be taken to change.

template <typename D, typename T = typename D::stored>
void encode_uint8(const T* x, T* y, uint8_t* codes, int64_t count, const double* levels) {
  const Encoder<typename D::computed> encoder(levels);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const auto value = D::load(x[i]);
    codes[i] = static_cast<uint8_t>(encoder(value));
    y[i] = D::relu(x[i], value);
  }
}

template <typename D, typename T = typename D::stored>
void decode_uint8(const T* grad, T* out, uint8_t* codes, int64_t count, const double* levels) {
  typename D::computed table[256];
  std::copy(levels, levels + 256, table);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = D::store(D::load(grad[i]) * table[codes[i]]);
}

// Two elements a byte: one of the first half of the tensor, and the one that lies `second` elements after it.

template <typename D, typename T = typename D::stored>
void encode_uint4(const T* x, T* y, uint8_t* codes, int64_t count, const double* levels, int64_t second) {
  const Encoder<typename D::computed> encoder(levels);
  const T* x2 = x + second;
  T* y2 = y + second;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const auto low = D::load(x[i]), high = D::load(x2[i]);
    codes[i] = static_cast<uint8_t>(encoder(low) + 16 * encoder(high));
    y[i] = D::relu(x[i], low);
    y2[i] = D::relu(x2[i], high);
  }
}

template <typename D, typename T = typename D::stored>
void decode_uint4(const T* grad, T* out, uint8_t* codes, int64_t count, const double* levels, int64_t second) {
  typename D::computed table[16];
  std::copy(levels, levels + 16, table);
  const T* grad2 = grad + second;
  T* out2 = out + second;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    out[i] = D::store(D::load(grad[i]) * table[codes[i] & 15]);
    out2[i] = D::store(D::load(grad2[i]) * table[codes[i] >> 4]);
  }
}

template <typename T, typename Loop, typename... Last>
void in_blocks(Loop loop, const T* in, T* out, uint8_t* codes, int64_t count, const double* levels, Last... last) {
#pragma omp parallel for schedule(static) if (count >= PARALLEL)
  for (int64_t i = 0; i < count; i += BLOCK) {
    loop(in + i, out + i, codes + i, std::min(BLOCK, count - i), levels, last...);
  }
}

}  // namespace

// A function for each save mode and dtype, which lean.py calls by name.
#define EXPORT(name, dtype, D)                                                                                     \
  extern "C" void name##_uint8_##dtype(const D::stored* in, D::stored* out, uint8_t* codes, int64_t count,         \
                                       const double* levels) {                                                     \
    in_blocks(name##_uint8<D>, in, out, codes, count, levels);                                                     \
  }                                                                                                                \
  extern "C" void name##_uint4_##dtype(const D::stored* in, D::stored* out, uint8_t* codes, int64_t count,         \
                                       const double* levels) {                                                     \
    in_blocks(name##_uint4<D>, in, out, codes, (count + 1) / 2, levels, count / 2);                                \
  }

EXPORT(encode, float16, Float16)
EXPORT(decode, float16, Float16)
EXPORT(encode, bfloat16, BFloat16)
EXPORT(decode, bfloat16, BFloat16)
EXPORT(encode, float32, Plain<float>)
EXPORT(decode, float32, Plain<float>)
EXPORT(encode, float64, Plain<double>)
EXPORT(decode, float64, Plain<double>)
