"""Tests of publishing and loading; a package, since two of its files have the names of files elsewhere."""
