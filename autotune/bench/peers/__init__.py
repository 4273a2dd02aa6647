"""Other models and runtimes, which ``ramnet bench --peers`` compares with ours."""
