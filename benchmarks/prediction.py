"""Predicted against real peaks for the families of the prediction test: python -m benchmarks.prediction"""

from __future__ import annotations

from tests.integration.test_prediction import FAMILIES, allocator_peak, checkpointed, predict, prepare, workload_of


def main() -> None:
    """Print one row per family and method, in Markdown."""
    print("| family | method | predicted bytes | allocator's bytes | ratio |\n|---|---|---:|---:|---:|")
    for family, (model_cls, config_cls, sizes, batch, sequence) in FAMILIES.items():
        workload = workload_of(model_cls, config_cls(**sizes))
        analysis, forecaster = prepare(workload, batch=batch, sequence=sequence, dtype="fp32", device="cpu")
        for name, wrap in (("plain", None), ("checkpoint", checkpointed)):
            predicted = predict(forecaster, name).peak_bytes
            real = allocator_peak(workload, analysis, wrap, batch, sequence)
            print(f"| {family} | {name} | {predicted:,} | {real:,} | {predicted / real:.4f} |")


if __name__ == "__main__":
    main()
