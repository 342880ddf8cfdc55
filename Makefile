# Thin names for the scripts, which also run where make is not installed.
.DEFAULT_GOAL := help
.PHONY: help demo test lint

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(firstword $(MAKEFILE_LIST))

demo: ## Train, save, kill, resume: the whole idea in about two minutes
	@scripts/demo

test: ## Build everything and run every test (scripts/test)
	@scripts/test

lint: ## Check formatting, layering, types, and what clang-tidy finds (scripts/lint)
	@scripts/lint
