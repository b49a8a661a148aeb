"""Compares the method with published controls on the testbeds: the same requests, data and number of network passes."""
