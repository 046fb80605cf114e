"""Automation of a chain: source assets, sensors, schedules, jobs and the runs that they start.

Front door: `chain`.
"""
