"""What `benchmarks.gpu` measures: each module has some of its parts, built from what the other benchmarks measure."""
