# trained by: python tests/baselines.py two_tasks tests/two_tasks_discrete.py
task = "grids_and_equations"
steps = 4000
batch_size = 64
