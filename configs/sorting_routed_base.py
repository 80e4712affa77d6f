# python train_base.py configs/sorting_routed_base.py
# insertion sort on short lists, merge and heap sort on long ones, none of them always
task = "sorting_algorithms"
strategy_weights = {  # bubble, selection, insertion, merge, heap
    "4 numbers": [0.1, 0.1, 0.6, 0.1, 0.1],
    "5 numbers": [0.15, 0.15, 0.3, 0.2, 0.2],
    "6 numbers": [0.1, 0.1, 0.1, 0.35, 0.35],
}
steps = 9600
crop = 24
