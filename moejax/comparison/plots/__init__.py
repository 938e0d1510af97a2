"""The report's pictures. Only the files of this folder import matplotlib, and none touches pyplot's global state."""
