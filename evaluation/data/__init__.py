"""The benchmarks' data: fetched, unpacked safely, placed where lmms-eval looks, and verified."""

from .benchmarks import BENCHMARKS, Benchmark
from .prepare import prepare
from .verify import Report, check

__all__ = ["BENCHMARKS", "Benchmark", "Report", "check", "prepare"]
