# python tests/baselines.py two_tasks tests/two_tasks_discrete.py
base = "tests/two_tasks_base.py"
n_latents = 6
