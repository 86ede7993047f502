"""Published benchmarks, read from their own files: RULER, LongBench, InfiniteBench."""
