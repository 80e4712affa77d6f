# python factorize.py configs/sorting_continuous.py
base = "configs/sorting_base.py"
z_dim = 4
steps = 1400
held_steps = 1200
router_marginal_kl_weight = 1.0
