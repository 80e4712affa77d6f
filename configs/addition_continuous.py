# python factorize.py configs/addition_continuous.py
base = "configs/addition_base.py"
z_dim = 4
held_steps = 600
router_marginal_kl_weight = 1.0
