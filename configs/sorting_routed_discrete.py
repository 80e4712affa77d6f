# python factorize.py configs/sorting_routed_discrete.py
base = "configs/sorting_routed_base.py"
n_latents = 5
steps = 850
responsibility_steps = 530
