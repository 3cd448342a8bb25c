"""Code that only reproduces the paper (arXiv:2505.22074): the dying ReLUs of appendix A, and the sweep of table 4."""
