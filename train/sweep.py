"""Train every cell of a recipe with every seed, and write the table with the paper's values.

    python train/sweep.py --recipe table4_small [--seeds 42 1 10] [--jobs 2] [--minutes 28] [--data DATA] [--output DIR]

It can be stopped at any time: the same command resumes it and skips finished cells. With --minutes it ends before that
many minutes have passed, with exit status 75 while cells are left. DIR can be moved to another machine that has the
same data, at any path. Cells that run at once (--jobs) share one memory-mapped copy of the decoded images.
DIR contains table.md, table.json and bars.png; `--table-only` writes them from the finished cells.
"""

from paper.sweep import main

if __name__ == "__main__":
    main(__file__, __doc__, recipe="table4_small")
