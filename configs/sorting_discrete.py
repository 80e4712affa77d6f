# python factorize.py configs/sorting_discrete.py
base = "configs/sorting_base.py"
n_latents = 5
steps = 850
responsibility_steps = 530
