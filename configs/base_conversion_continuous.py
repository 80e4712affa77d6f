# python factorize.py configs/base_conversion_continuous.py
base = "configs/base_conversion_base.py"
z_dim = 4
steps = 1000
held_steps = 800
router_marginal_kl_weight = 1.0
