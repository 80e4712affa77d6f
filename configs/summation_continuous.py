# python factorize.py configs/summation_continuous.py
base = "configs/summation_base.py"
z_dim = 4
steps = 1000
held_steps = 800
router_marginal_kl_weight = 1.0
