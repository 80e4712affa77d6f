# python train_base.py configs/grid_base.py
task = "grid_pathfinding"
steps = 2000
