"""GGUF files: conversion by llama.cpp, quantisation, importance matrices. Front doors: `converter` and `make`."""
