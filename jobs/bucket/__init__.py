"""Files and batches whose bytes are in a bucket, and what is known of them in the database that routers share."""
