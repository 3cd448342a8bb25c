"""`DeadUnitMonitor` in other people's loops: a module for each library, which alone imports it."""
