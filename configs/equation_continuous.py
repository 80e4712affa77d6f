# python factorize.py configs/equation_continuous.py
base = "configs/equation_base.py"
z_dim = 4
steps = 1000
held_steps = 800
router_marginal_kl_weight = 1.0
