"""What people do about runs that spike, diverge or have a wrong rate: compared under faults.

    python -m benchmarks.stability runs/stability --tasks fashion

``tasks.py`` has what is trained, ``faults.py`` what goes wrong, ``methods.py`` the rows, ``run.py``
one run and its record, ``report.py`` the tables and the figure that are made from records alone.
"""
