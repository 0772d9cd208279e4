"""MLflow's pages of a real search, in a real browser: what a user looks at and compares.

The README's picture of them is made again by

    CRDIFF_SCREENSHOTS=/tmp/pages CRDIFF_UI_SEARCH='budget.steps=20 prompts.search=16
    prompts.rerank=16 prompts.validation=64' pytest -n0 tests/integration/test_mlflow_ui.py

and copying /tmp/pages/comparison.png to tests/integration/mlflow.png.
"""
