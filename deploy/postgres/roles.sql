-- Three roles with no more rights than their work needs. For psql, as the owner of the database,
-- after `promptmill db upgrade`; running it again changes passwords and nothing else:
--
--   psql -v worker="$(cat worker-password)" -v producer="…" -v reader="…" -f roles.sql DATABASE
--
-- Every namespace is visible to each role: tenants that must not trust each other's programs get
-- a database each.
\set ON_ERROR_STOP on
BEGIN;

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY['promptmill_worker', 'promptmill_producer', 'promptmill_reader']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec

ALTER ROLE promptmill_worker PASSWORD :'worker';
ALTER ROLE promptmill_producer PASSWORD :'producer';
ALTER ROLE promptmill_reader PASSWORD :'reader';
ALTER ROLE promptmill_reader SET default_transaction_read_only = on;

SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO promptmill_worker, promptmill_producer, '
              'promptmill_reader', current_database()) \gexec
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO promptmill_worker, promptmill_producer, promptmill_reader;

-- A worker reads and writes rows; it changes no table.
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO promptmill_worker;
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO promptmill_worker;

-- A producer submits, looks at, cancels and repeats jobs. Stored answers are none of its business.
-- It notes which consumer groups read results, and holds the broker's epoch still while it
-- publishes, which asks for the right to update one column of it.
GRANT SELECT, INSERT, UPDATE ON jobs, batches, result_groups TO promptmill_producer;
GRANT SELECT, UPDATE (since) ON broker TO promptmill_producer;

-- A reader looks.
GRANT SELECT ON ALL TABLES IN SCHEMA public TO promptmill_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO promptmill_reader;

-- The revision of the tables is for whoever upgrades them.
REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM promptmill_worker;
COMMIT;
