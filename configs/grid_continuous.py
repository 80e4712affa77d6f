# python factorize.py configs/grid_continuous.py
base = "configs/grid_base.py"
z_dim = 4
steps = 1000
held_steps = 800
router_marginal_kl_weight = 1.0
