"""Train every cell of a recipe with every seed, and write the table beside the paper's.

    python train/sweep.py --recipe table4_small [--seeds 42 1 10] [--jobs 2] [--minutes 28] [--data DATA] [--output DIR]

It can be stopped at any time: the same command resumes it, and finished cells are not run again. With --minutes it ends
by itself before so many have passed, with exit status 75 while cells are left, and DIR can go on on another machine,
with the same data wherever they are there. The cells that run at once (--jobs) map one copy of the decoded images.
DIR holds table.md, table.json and bars.png; `--table-only` writes them from what is finished.
"""

from paper.sweep import main

if __name__ == "__main__":
    main(__file__, __doc__, recipe="table4_small")
