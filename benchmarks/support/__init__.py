"""What the benchmarks share. The tests use its pipeline and its raw client as well."""
