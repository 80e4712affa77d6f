# python factorize.py configs/grid_skewed_discrete.py
# the shares of the strategies are told, which strategy has which is not
base = "configs/grid_skewed_base.py"
prior = [0.6, 0.3, 0.1]
