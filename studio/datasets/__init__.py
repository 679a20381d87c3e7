"""Datasets: upload, inspection, problems by line, versions."""
