# python train_base.py configs/grid_skewed_base.py
# a base that prefers one strategy
task = "grid_pathfinding"
strategy_weights = [0.6, 0.3, 0.1]
steps = 1000
batch_size = 128
