"""Setups that differ from the tests beside these, one kind a file; the oracle is the original code (`by_hand.py`).

test_python_decisions       what Python decides, anew at every call
test_second_run             what the second run of a branch depends on
test_streams                streams that are detached, copied, cast, replaced
test_caches_and_checkpoints key-value caches in training; an outer checkpoint around drawn couplings
test_scales                 small, large and growing streams; drift in float arithmetic
test_wrappers_and_threads   wrapped and copied blocks, replicas, threads, verify and drift
test_in_place               in-place adds and writes, objects, gradients within a step

Parameters that are not resident: tests/integration/test_distributed.py. Parameters changed through `.data`:
tests/engine/test_errors.py. Weights that were not loaded: tests/unit/test_weights_loaded.py. Capture in threads:
tests/unit/test_capture_in_threads.py.
"""
