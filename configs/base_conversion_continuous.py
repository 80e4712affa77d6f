# python factorize.py configs/base_conversion_continuous.py
base = "configs/base_conversion_base.py"
z_dim = 4
held_steps = 600
router_marginal_kl_weight = 1.0
