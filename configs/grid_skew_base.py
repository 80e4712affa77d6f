# python train_base.py configs/grid_skew_base.py
# strategies that are not equally frequent: 60% right-first, 30% down-first, 10% alternating
task = "grid_pathfinding"
strategy_weights = [0.6, 0.3, 0.1]
steps = 1000
batch_size = 128
