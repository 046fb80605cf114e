"""Inputs that mean harm, or that a user got wrong."""
