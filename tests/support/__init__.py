"""What several test folders and the benchmarks share: an exact allocator hook and a reference trainer."""
