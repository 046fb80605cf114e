"""GGUF files: conversion by llama.cpp, quantisation, importance matrices. Front doors: `make` and `imatrix`."""
