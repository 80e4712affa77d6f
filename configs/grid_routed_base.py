# python train_base.py configs/grid_routed_base.py
task = "grid_pathfinding"
strategy_weights = {"wide": [0.7, 0.2, 0.1], "tall or square": [0.1, 0.2, 0.7]}  # right-first, down-first, alternating
steps = 2000
