"""What the Hessian callback needs: its batches, and one Hessian over processes."""
