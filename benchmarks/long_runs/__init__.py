"""Runs that take hours on a CPU: state saved as they go, gone on with after any end, recorded as far as they came."""
