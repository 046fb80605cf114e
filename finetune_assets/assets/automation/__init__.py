"""What runs a chain without a person: source assets, sensors, schedules, jobs and the runs that they start.

Front door: `chain`.
"""
