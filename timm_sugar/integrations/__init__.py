"""`DeadUnitMonitor` in other libraries' training loops: one module per library, the only one that imports it."""
