"""Pipeline parallelism: schedules as data, their checker, and the one runtime that executes them."""
