"""From MODEL on the command line to a workload: what to build, and how to call it."""
