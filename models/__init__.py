"""What things are: records, stores, configs, networks, objectives and the training loop.

Knows no Prefect and no Dask.
"""
