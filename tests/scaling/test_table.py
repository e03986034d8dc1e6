"""Tables of runs: what is read, what is refused, and that every row left out has a named reason."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.scaling.table import groups, parse_columns, read_table, select
from jaxlm.scaling.where import where_mask

PLAIN = "params,train_flop,loss_nats,kind\n1e6,1e15,4.0,a\n2e6,2e15,3.5,a\n4e6,4e15,3.2,b\n8e6,9e15,9.0,b\n"
ROLES = {"N": "params", "C": "train_flop", "loss": "loss_nats"}


@pytest.fixture
def table(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_text(text)
        return read_table(path)

    return write


def test_tokens_come_from_the_identity_and_the_note_says_so(table):
    points, excluded, notes = select(table(PLAIN), ROLES)
    np.testing.assert_allclose(points.D, points.C / (6 * points.N), rtol=1e-15)
    assert excluded == []
    assert notes == ["--columns names no tokens: D = C/(6N)"]
    assert points.rows.tolist() == [0, 1, 2, 3]


def test_given_tokens_are_used_and_flops_derived(table):
    t = table("n,d,loss\n1e6,1e8,3\n2e6,1e8,2.5\n")
    points, _, notes = select(t, {"N": "n", "D": "d"})
    assert points.D.tolist() == [1e8, 1e8]
    np.testing.assert_allclose(points.C, [6e14, 1.2e15])
    assert notes == ["--columns names no FLOPs: C = 6ND"]


def test_every_row_left_out_has_its_rule(table):
    text = PLAIN + "nan,1e15,3,a\n1e6,1e15,-1,a\n1e6,,3,a\n"
    points, excluded, _ = select(
        table(text), ROLES, where="kind in ('a', 'b') and C > 1.5e15", drop_highest=1
    )
    assert [(e.row, e.rule) for e in excluded] == [
        (0, "where"),
        (3, "drop_highest"),
        (4, "value"),
        (5, "value"),
        (6, "value"),
    ]
    assert excluded[1].detail == "loss=9"
    assert excluded[2].detail == "N=nan"
    assert points.L.tolist() == [3.5, 3.2]
    assert points.rows.tolist() == [1, 2]


def test_the_highest_are_dropped_after_the_other_rules(table):
    """Rows that are out anyway do not count as the highest."""
    points, _, _ = select(table(PLAIN), ROLES, where="loss < 9", drop_highest=1)
    assert points.L.tolist() == [3.5, 3.2]


def test_our_own_table_needs_no_columns_and_names_its_exclusions(table):
    text = (
        "id,config_hash,status,exclude,detail,n_total,tokens,flops_exact,loss,unique_tokens,seed\n"
        "a,x,finished,,,1e5,1e7,7e12,3.0,1e8,0\n"
        "b,x,finished,diverged,twice its neighbours,1e5,1e7,7e12,6.0,1e8,0\n"
        "c,x,running,,,1e5,1e7,7e12,3.1,1e8,1\n"
        "d,x,finished,,,2e5,1e7,1.4e13,2.9,1e8,1\n"
    )
    points, excluded, notes = select(table(text), {})
    assert points.C.tolist() == [7e12, 1.4e13]
    assert points.extra["U"].tolist() == [1e8, 1e8]
    assert points.extra["seed"].tolist() == [0, 1]
    assert [(e.row, e.rule, e.detail) for e in excluded] == [
        (1, "diverged", "twice its neighbours"),
        (2, "status", "running"),
    ]
    assert notes == []
    everything, _, _ = select(table(text), {}, drop_status=False)
    assert len(everything) == 4


def test_a_foreign_tokens_column_is_not_taken_unasked(table):
    """`N=..,C=..` means D = C/(6N), whatever else the table holds."""
    t = table("params,flop,tokens,loss\n1e6,6e14,777,3\n2e6,6e14,777,2\n")
    assert select(t, {"N": "params", "C": "flop"})[0].D.tolist() == [1e8, 5e7]


FOREIGN = "params,flop,loss,budget,lr,seed,exclude,status\n"


@pytest.mark.parametrize("own", [False, True])
def test_names_of_our_own_tables_mean_nothing_in_others(table, own):
    """A text `lr` or `seed` refuses no fit, a `budget` in dollars groups no runs, `exclude` drops no row."""
    head, cell = (FOREIGN.replace("\n", ",config_hash\n"), ",x") if own else (FOREIGN, "")
    lines = [f"{i}e6,6e14,{4 - i / 2},{100 * i},auto,a,FALSE,done{cell}" for i in (1, 2)]
    t = table(head + "\n".join(lines) + "\n")
    roles = {"N": "params", "C": "flop"}
    if own:  # the same columns, in a table that says whose it is
        with pytest.raises(UserError, match="none of 2 rows is left: 2 by the rule 'FALSE'"):
            select(t, roles)
        return
    points, excluded, notes = select(t, roles)
    assert (len(points), excluded) == (2, [])
    assert dict(points.extra) == {}
    assert any("exclude means nothing" in note for note in notes)
    assert select(t, roles | {"budget": "budget"})[0].extra["budget"].tolist() == [100, 200]


@pytest.mark.parametrize("mark", ["NA", "N/A", "-", "\N{EM DASH}", "\N{EN DASH}", "null", "None", "NaN", ""])
def test_cells_that_say_there_is_no_number(table, mark):
    points, excluded, _ = select(table(PLAIN + f"1e6,1e15,{mark},a\n"), ROLES)
    assert (len(points), [(e.row, e.rule, e.detail) for e in excluded]) == (4, [(4, "value", "L=nan")])
    words = table(f"{PLAIN.splitlines()[0]},norm\n1e6,1e15,3,a,none\n1e6,1e15,3,a,none\n")
    assert where_mask("norm == 'none'", words.columns).all()


def test_a_cell_that_is_no_number_may_be_left_out(table):
    """Its line is that of the file, blank lines and all; the message says how to go on without it."""
    t = table(PLAIN.replace("2e6", "\n2e6") + "1e6,1e15,diverged,a\n", "bad.csv")
    said = r"bad.csv', line 7, column 'loss_nats': 'diverged' is not a number.*--where='loss >= 0'"
    with pytest.raises(UserError, match=said):
        select(t, ROLES)
    for where in ("loss >= 0", "loss_nats != 'diverged'"):
        points, excluded, _ = select(t, ROLES, where=where)
        assert (len(points), [(e.row, e.rule) for e in excluded]) == (4, [(4, "where")])
    same = table("params,flop,loss\n1e6,6e14,4\n2e6,6e14,bad\n")  # the column is called as the role
    assert len(select(same, {"N": "params", "C": "flop"}, where="loss >= 0")[0]) == 1
    with pytest.raises(UserError, match="without commas, as 1234"):
        select(table(PLAIN + '"1,234,567",1e15,3,a\n'), ROLES)
    with pytest.raises(UserError, match="line 4, column 'kind': 'b' is not"):
        select(groups(table(PLAIN), "kind")["b"], {**ROLES, "sigma": "kind"})


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ",")])
def test_the_delimiter_is_what_the_header_holds(table, name, mark):
    t = table(PLAIN.replace(",", mark), name)
    assert list(t.columns) == ["params", "train_flop", "loss_nats", "kind"]
    assert select(t, ROLES)[0].L.tolist() == [4.0, 3.5, 3.2, 9.0]


RUNS = [{"n": 1e6, "hp": {"lr": 0.1}, "loss": 4}, {"n": 2e6, "hp": {"lr": 0.2, "wd": 1}, "loss": None}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RUNS, indent=1),
        "\n\n".join(map(json.dumps, RUNS)),
        json.dumps({"n": [1e6, 2e6], "hp.lr": [0.1, 0.2], "hp.wd": [None, 1], "loss": [4, None]}),
        json.dumps({"n": {"0": 1e6, "1": 2e6}, "hp.lr": {"0": 0.1, "1": 0.2}, "loss": {"0": 4, "1": None}}),
    ],
)
def test_json_reads_as_csv_does(table, text):
    t = table(text, "t.json")
    points, excluded, _ = select(t, {"N": "n", "lr": "hp.lr", "loss": "loss"}, needs=("N", "lr"))
    assert (points.N.tolist(), points.extra["lr"].tolist()) == ([1e6, 2e6], [0.1, 0.2])
    np.testing.assert_array_equal(select(t, {"N": "n", "x": "loss"}, needs=("N",))[0].extra["x"], [4, np.nan])
    assert excluded == []


def test_packed_and_markdown_tables_are_read(table, tmp_path):
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(PLAIN.replace(",", "\t").encode()))
    assert select(read_table(tmp_path / "x.tsv.gz"), ROLES)[0].L.tolist() == [4.0, 3.5, 3.2, 9.0]
    rows = [f"| {line.replace(',', ' | ')} |" for line in PLAIN.splitlines()]
    t = table("\n".join([rows[0], "|:---|---:|:-:|-----|", *rows[1:]]), "t.md")
    assert list(t.columns) == ["params", "train_flop", "loss_nats", "kind"]
    assert (select(t, ROLES)[0].L.tolist(), t.place(0)) == ([4.0, 3.5, 3.2, 9.0], "line 3")


def test_columns_that_nobody_asks_for_do_no_harm(table):
    """Two without a name, two of one name; a line ends at a line feed alone, not at a form feed in a cell."""
    t = table("params,flop,loss,note,note,,\n1e6,6e14,4,a,b,,\n2e6,6e14,3,a\fc,\u2028,,\n")
    assert list(t.columns) == ["params", "flop", "loss"]
    assert len(select(t, {"N": "params", "C": "flop"})[0]) == 2
    with pytest.raises(UserError, match=r"--columns=x=note: table .* has the column 'note' twice"):
        select(t, {"N": "params", "C": "flop", "x": "note"})
    with pytest.raises(UserError, match=r"--group=note: .* twice"):
        groups(t, "note")


def test_column_names_of_any_kind(table):
    t = table('"params, total",FLOPs (1e18),loss,MFU %\n1e6,6e14,4,30\n2e6,6e14,3,40\n')
    roles = parse_columns('"N=params, total",C=FLOPs (1e18),mfu=MFU %')
    assert select(t, roles, where="mfu > 35")[0].N.tolist() == [2e6]
    with pytest.raises(UserError, match="in quotes"):
        parse_columns("N=params, total")
    with pytest.raises(UserError, match="needs a role"):
        select(t, roles, where="MFU % > 35")


def test_blocks_may_be_strings_and_sigma_is_checked(table):
    """A row without sigma is neither lost in silence nor weighted by a guess."""
    t = table("n,d,l,trunk,s\n1,1,3,x,.1\n2,1,3,y,.1\n3,1,3,x,0\n4,1,3,x,\n")
    roles = {"N": "n", "D": "d", "loss": "l", "block": "trunk", "sigma": "s"}
    with pytest.raises(UserError, match=r"line 4: sigma=0; 2 of 4 rows.*--where='sigma > 0', or leave sigma"):
        select(t, roles)
    points, excluded, _ = select(t, roles, where="sigma > 0")
    assert points.block.tolist() == [0, 1]
    assert [(e.row, e.rule) for e in excluded] == [(2, "where"), (3, "where")]
    assert len(select(t, {k: v for k, v in roles.items() if k != "sigma"})[0]) == 4


def test_a_row_is_dropped_only_for_what_the_fit_reads(table):
    """FLOPs that some rows lack are filled in as the others count them; a loss that nothing reads is none."""
    t = table("n,d,c,l\n1e6,1e8,7e14,3\n2e6,1e8,,2.5\n4e6,1e8,2.8e15,2\n4e6,,2.8e15,2\n")
    roles = {"N": "n", "D": "d", "C": "c", "loss": "l"}
    points, excluded, notes = select(t, roles)
    np.testing.assert_allclose(points.C, [7e14, 1.4e15, 2.8e15])
    assert [(e.row, e.detail) for e in excluded] == [(3, "D=nan")]
    assert [note for note in notes if "1 of 3 rows have no C (c)" in note and "C = 7 N D" in note]
    assert len(select(t, roles, needs=("N", "D", "C", "L"))[0]) == 2
    rates = table("c,lr,l\n1e15,.1,\n2e15,.2,3\n")
    points, excluded, notes = select(rates, {"C": "c", "lr": "lr", "loss": "l"}, needs=("C", "lr"))
    assert (len(points), excluded) == (2, [])
    assert np.isnan(points.L).all()
    assert "1 of 2 rows have no loss (l)" in notes[0]


@pytest.mark.parametrize("role", ["sparsity", "accuracy", "error"])
def test_shares_in_percent_are_refused_by_name(table, role):
    t = table(f"n,d,loss,{role}\n1,1,3,0\n2,1,3,50\n3,1,3,75\n")
    roles = {"N": "n", "D": "d", role: role}
    said = rf"line 3: {role}=50 is above 1 \(as in 2 rows\).*Divide percent by 100"
    with pytest.raises(UserError, match=said):
        select(t, roles, needs=("N", role))
    shares = table(f"n,d,loss,{role}\n1,1,3,.1\n2,1,3,.5\n")
    assert len(select(shares, roles, needs=("N", role))[0]) == 2
    assert len(select(t, roles)[0]) == 3  # nothing reads it


def test_numbers_with_a_suffix_are_read_and_the_note_says_so(table):
    """`--where` sees the cells as they are written."""
    text = "size,d,loss,share\n1.5B,20T,3,3.8%\n70m,1e9,3,40 %\n7e7,2e9,3,.5\n14M,2e9,3,\n"
    roles = {"N": "size", "D": "d", "accuracy": "share"}
    points, _, notes = select(table(text), roles, where="size != '14M'")
    np.testing.assert_allclose(points.N, [1.5e9, 7e7, 7e7], rtol=1e-15)
    assert points.D.tolist() == [2e13, 1e9, 2e9]
    np.testing.assert_allclose(points.extra["accuracy"], [0.038, 0.4, 0.5], rtol=1e-15)
    assert any("column 'size': 3 cells such as '1.5B' are read as 1.5e+09" in note for note in notes)
    for cell in ("1e3M", "M", "1.5BB", "nanM", "5ms"):
        with pytest.raises(UserError, match=f"'{cell}' is not a number"):
            select(table(f"n,d,loss\n{cell},1,3\n7e7,1,3\n"), {"N": "n", "D": "d"})


def test_a_column_may_be_multiplied(table):
    """A factor stands behind a star, unless a column is called so."""
    t = table("n,a/flops,acc,loss,c*2\n1,6e5,50,3,7\n2,6e5,60,2,8\n")
    roles = parse_columns("N=n*1e6,C=a/flops * 1e9,accuracy=acc*0.01")
    points, _, _ = select(t, roles, where="N < 2e6", needs=("N", "D", "L", "accuracy"))
    assert (points.N.tolist(), points.D.tolist()) == ([1e6], [1e8])
    assert points.extra["accuracy"].tolist() == [0.5]
    assert select(t, {"N": "n", "D": "c*2"})[0].D.tolist() == [7, 8]
    for wrong in ("nn*1e6", "n*x", "n*-1", "n*"):
        with pytest.raises(UserError, match="no column"):
            select(t, {"N": wrong, "D": "c*2"})


def test_all_roles_that_are_missing_are_named(table):
    """The line that is proposed is a whole one: N alone would hide what is called as our tables call it."""
    with pytest.raises(UserError, match=r"needs N .*, such as --columns=N=params,D=tokens,loss=loss$"):
        select(table("params,tokens,loss\n1,1,3\n"), {})
    with pytest.raises(UserError, match=r"needs N, D, loss .*--columns=N=Params,loss=nll,C=FLOP$"):
        select(table("Params,FLOP,nll\n1,1,3\n"), {})
    with pytest.raises(UserError, match=r"needs N, D, loss .*it has a, b; .*--columns=N=...,D=...,loss=...$"):
        select(table("a,b\n1,1\n"), {})


def test_a_law_of_another_column_needs_no_loss(table):
    points, _, _ = select(
        table("b,s\n8,100\n16,60\n"), {"batch": "b", "steps": "s"}, needs=("batch", "steps")
    )
    assert np.isnan(points.L).all()
    assert points.extra["steps"].tolist() == [100, 60]


def test_groups_keep_their_row_numbers(table):
    parts = groups(table(PLAIN), "kind")
    assert {k: v.rows.tolist() for k, v in parts.items()} == {"a": [0, 1], "b": [2, 3]}
    assert select(parts["b"], ROLES)[0].rows.tolist() == [2, 3]


def test_parquet_reads_as_csv_does(table, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    columns = {
        "params": [10**6, 2 * 10**6],
        "train_flop": [1e15, None],
        "loss_nats": [4.0, 3.0],
        "kind": ["a", "b"],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    points, excluded, _ = select(read_table(tmp_path / "t.parquet"), ROLES, where="kind != 'z'")
    assert points.N.tolist() == [1e6]
    assert [(e.row, e.rule) for e in excluded] == [(1, "value")]


def test_the_hash_is_of_the_file(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    t = read_table(tmp_path / "t.csv")
    assert t.sha256 == hashlib.sha256((tmp_path / "t.csv").read_bytes()).hexdigest()
    assert list(t.columns) == ["params", "train_flop", "loss_nats", "kind"]  # no byte order mark


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2,3\n", "line 2: 3 cells under 2"),
        ("1,2\n3,4\n", "no header"),
        ('a,b\n"1,2\n', "not a CSV"),
        ("a,b\n1,\0\n", "zero bytes"),
        ('{"a": 1, "b": {"c": 2}}', "is JSON and no table"),
        ("[1, 2]", "is JSON and no table"),
        ("[]", "is JSON and no table"),
        ('{"a": [1, 2], "b": [1]}', "is JSON and no table"),
        ('{"a": 1}\n{"a": 2,}\n', "line 2: not JSON"),
        ("# of a paper\na,b\n1,2\n", "delete the lines with # above the header"),
    ],
)
def test_what_is_no_table_is_refused(table, text, said):
    with pytest.raises(UserError, match=said):
        table(text)


@pytest.mark.parametrize(
    "text", ["#n;d;loss\n1;2;3\n", "#n,d,loss\n1,2,3\n", "PK,d,loss\n1,2,3\n", "BZ,d\n1,2\n"]
)
def test_headers_that_look_like_something_else_are_read(table, text):
    assert list(table(text).columns) == text.splitlines()[0].replace(";", ",").split(",")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        read_table(tmp_path)
    (tmp_path / "x.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_table(tmp_path / "x.csv")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="packed: unpack it first"):
        read_table(tmp_path / "x.zip")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(PLAIN.encode())[:20])
    with pytest.raises(UserError, match="cannot be unpacked"):
        read_table(tmp_path / "x.csv.gz")
    (tmp_path / "x.parquet").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_table(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("roles", "options", "said"),
    [
        (
            {"N": "parms", "C": "train_flop", "loss": "loss_nats"},
            {},
            "no column 'parms'; did you mean 'params'",
        ),
        (
            {"N": "kind", "C": "train_flop", "loss": "loss_nats"},
            {},
            "line 2, column 'kind': 'a' is not a number; nor is any other cell .* name another for N",
        ),
        ({"N": "params", "loss": "loss_nats"}, {}, "needs D"),
        (
            {"C": "train_flop", "loss": "loss_nats"},
            {},
            "needs N, D .*--columns=N=params,loss=loss_nats,C=train_flop",
        ),
        ({"N": "params", "C": "train_flop"}, {}, "needs loss"),
        (ROLES, {"where": "C > 1e30"}, "none of 4 rows is left: 4 by the rule 'where'"),
        (ROLES, {"where": "c < 1"}, "no column 'c'"),
        (ROLES, {"drop_highest": -1}, "must not be negative"),
    ],
)
def test_refusals_of_a_selection(table, roles, options, said):
    with pytest.raises(UserError, match=said):
        select(table(PLAIN), roles, **options)


def test_parse_columns_refuses_nonsense():
    assert parse_columns("N=a,L=b") == {"N": "a", "loss": "b"}
    for text in ("N", "N=", "=a", "N=a,N=b"):
        with pytest.raises(UserError):
            parse_columns(text)


COLUMNS = {"C": np.array([1.0, 2, 3]), "N": np.array([3.0, 2, 1]), "kind": np.array(["a", "b", "a"])}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("C < 2", [1, 0, 0]),
        ("1 < C <= 3", [0, 1, 1]),
        ("not C == 2", [1, 0, 1]),
        ("C*N == 3 or kind == 'b'", [1, 1, 1]),
        ("-C + 2**2 > N/1 - 1 and C % 2 == 1", [1, 0, 1]),
        ("kind not in ['a']", [0, 1, 0]),
        ("C in (1, 3)", [1, 0, 1]),
        ("2**9**9**9 > C", [1, 1, 1]),
    ],
)
def test_where_is_arithmetic_over_columns(text, want):
    assert where_mask(text, COLUMNS).tolist() == [bool(v) for v in want]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "C.__class__",
        "C[0] > 1",
        "[c for c in (1,2)]",
        "lambda: 1",
        "(C := 1) > 0",
        "C",
        "C and N",
        "C < 'a'",
        "kind < C",
        "C <",
        "C in N",
        "'%s' % C == 'a'",
        "",
        "-kind == 'a'",
    ],
)
def test_where_refuses_everything_else(text):
    with pytest.raises(UserError, match="--where"):
        where_mask(text, COLUMNS)


@pytest.mark.parametrize("text", ["C < 2 & N > 1", "C < 2 | N > 1", "(C < 2) & (N > 1)", "~(C < 2)"])
def test_where_says_how_and_is_written(text):
    with pytest.raises(UserError, match="write `and`, `or` and `not`"):
        where_mask(text, COLUMNS)


def test_suffixes_are_read_where_they_can_mean_one_thing(table):
    """A percent of a loss, a rate in milli, a factor on top, 70 beside 1.4B: each is refused."""
    head = "n,d,loss,rate,share\n"
    t = table(head + "70M,1e9,4%,3m,52%\n1.4B,1e9,3%,4m,53%\n")
    points, _, _ = select(t, {"N": "n", "D": "d", "loss": "d", "accuracy": "share"})
    assert (points.N.tolist(), points.extra["accuracy"].tolist()) == ([70e6, 1.4e9], [0.52, 0.53])
    for role, column in (("loss", "loss"), ("sigma", "loss"), ("lr", "rate"), ("U", "share"), ("error", "n")):
        with pytest.raises(UserError, match="a suffix is read in counts, % in sparsity, accuracy, error"):
            select(t, {"N": "n", "D": "d", "loss": "d", role: column})
    with pytest.raises(UserError, match="has '70M', and a suffix does not go together with a factor"):
        select(t, {"N": "n*1e6", "D": "d", "loss": "d"})
    with pytest.raises(UserError, match=r"70 beside 1[.]4B: in which unit"):
        select(table(head + "70,1e9,4,1,1\n1.4B,1e9,3,1,1\n"), {"N": "n", "D": "d"})


def test_labels_are_not_multiplied_and_a_doubled_name_is_no_factor(table):
    with pytest.raises(UserError, match=r"no column 'kind\*2'"):
        select(table(PLAIN), ROLES | {"block": "kind*2"})
    with pytest.raises(UserError, match=r"the column 'n\*2' twice"):
        select(table("n,n*2,n*2,d,loss\n1,2,3,4,5\n"), {"N": "n*2", "D": "d"})


def test_damaged_and_odd_files_are_refused_in_one_line(table, tmp_path):
    path = tmp_path / "t.csv.gz"
    packed = gzip.compress(PLAIN.encode())
    for content in (packed[:10] + b"\xff" * 20 + packed[-8:], packed[:-9], b"\x1f\x8b"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be unpacked"):
            read_table(path)
    with pytest.raises(UserError, match="is JSON and no table"):
        table("[" * 100_000, "t.json")
    with pytest.raises(UserError, match="the columns name other rows"):
        table('{"n": {"0": 1, "1": 2}, "loss": {"1": 3, "0": 4}}', "t.json")
    two = table('{"n": 1, "k": "a\u2028b"}\n{"n": 2, "k": "c"}\n', "t.jsonl")
    assert two.columns["n"].tolist() == [1, 2]


def test_a_reader_that_refuses_nothing_leaves_such_rows_out(table):
    """What a report reads again was fitted already, with a --where that it need not repeat."""
    t = table("n,d,loss,s\n1e6,1e8,3,.1\n2e6,1e8,diverged,.1\n4e6,1e8,2,0\n")
    roles = {"N": "n", "D": "d", "loss": "loss", "sigma": "s"}
    points, left_out, _ = select(t, roles, refuse=False)
    assert (points.rows.tolist(), [(e.row, e.rule) for e in left_out]) == ([0], [(1, "value"), (2, "value")])
    with pytest.raises(UserError, match="'diverged' is not a number"):
        select(t, roles)
