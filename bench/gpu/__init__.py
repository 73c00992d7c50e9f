"""`make gpu`: builds, tests and times everything on the GPU of this machine, in minutes.

__main__   the stages, in order
stages     runs them: limits, partial results, one JSON file
facts      what the machine has, and what is missing
warm       compiles Triton's kernels in many processes
tests      the tests marked `gpu`, in processes that may die
plugin     pytest's side of that
table      one table of all of it
sanitize   `make gpu-sanitize`: compute-sanitizer over `small`
"""
