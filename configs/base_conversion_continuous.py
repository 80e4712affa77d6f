# python factorize.py configs/base_conversion_continuous.py
base = "configs/base_conversion_base.py"
z_dim = 4
