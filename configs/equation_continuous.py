# python factorize.py configs/equation_continuous.py
base = "configs/equation_base.py"
z_dim = 4
held_steps = 600
router_marginal_kl_weight = 1.0
